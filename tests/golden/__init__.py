"""Short runs whose numbers and files are kept, and run folders of earlier versions."""
