"""The columns of a statistics row, 8 bytes each: six float64, then counts (int64)."""

SUM_ABS, SUM_SQUARES, MAX_ABS, BASE_SQUARES, TUNED_SQUARES, DOT = range(6)
SIGN_FLIPS, NONFINITE = 6, 7
HISTOGRAM = 8  #: bucket 0: distance 0; bucket k: 2**(k-1) <= distance < 2**k
BUCKETS = 65
COLUMNS = HISTOGRAM + BUCKETS
