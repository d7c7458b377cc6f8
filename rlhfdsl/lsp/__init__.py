"""The language server, on pygls (the extra `lsp`); README.md tells what answers what."""
