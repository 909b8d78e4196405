"""The law of linear recurrences and the forms that follow from it; see `docs/design`."""
