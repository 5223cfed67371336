"""``fastgan bench``: training updates in several ways, checked against each other and timed side by side."""
