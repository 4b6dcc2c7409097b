"""The sources, one a file: each module offers ``SOURCE`` and ``PRESETS``, and the folder is the list of them."""
