"""Builds the documentation's site: what Markdown alone does not say comes from the notebooks and the packages."""
