"""Our traces in the formats of other engines, so that they can replay or study them."""
