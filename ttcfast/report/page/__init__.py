"""One self-contained HTML page from run folders: ``write_page`` in ``page.py``; the files beside it make its parts."""
