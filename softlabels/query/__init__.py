"""Views over tables, recipes, and the plans they freeze into."""
