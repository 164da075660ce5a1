"""What is done to an image: parameters drawn from a seed (`recipe`), operations on uint8 pixels (`ops`), mixing, digests."""
