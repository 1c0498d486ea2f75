"""The project inside other frameworks' loops; one file each."""
