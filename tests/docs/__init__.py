"""The documentation: the site, its command blocks, the API's description, the Python examples."""
