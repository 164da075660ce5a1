"""Views: parameters drawn from a seed (`recipe`), functional uint8 operations (`ops`), mixing partners (`mixing`)."""
