"""Short runs with stored numbers and files, and run folders of earlier versions."""
