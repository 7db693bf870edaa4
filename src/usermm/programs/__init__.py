"""Programs before they start: where they are, what kind of file, and whether a preloaded library reaches them."""
