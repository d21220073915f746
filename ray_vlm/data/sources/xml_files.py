"""Read XML from strangers: no document types, entities or external files."""

from typing import TYPE_CHECKING

from ray_vlm.data.sources.fields import text_fault

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

NO_TYPES = "a document type or entities, which are not read; remove the <!DOCTYPE ...> from the file"


def parse_xml(data: bytes) -> "Element":
    """Return the root element of an XML document. Raise `ValueError` with the reason and the fix."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        return fromstring(data, forbid_dtd=True)
    except DefusedXmlException:
        raise ValueError(f"the file has {NO_TYPES}") from None
    except (ParseError, LookupError, ValueError) as error:
        raise ValueError(f"not readable as XML ({error}); mend it, and save it as UTF-8") from None


def text_of(element: "Element", path: str) -> str:
    """Return the stripped text of the first element at a path, empty if there is none. Raise `ValueError`."""
    text = (element.findtext(path) or "").strip()
    if reason := text_fault(text):
        raise ValueError(f"<{path}> {reason}")
    return text
