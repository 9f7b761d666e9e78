"""Where the bytes live: 2-bit base records, the hot pool of int8 rows, page states, and the store that joins them."""
