"""Where conversations are kept: their values, the door of a store, and the two stores behind it."""
