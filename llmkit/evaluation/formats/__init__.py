"""Reports in the forms that people and other programs read; each module is one, registered by an entry point."""
