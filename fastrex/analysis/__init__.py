"""What features look like: their spread, spectrum and classes, and how training moves them."""
