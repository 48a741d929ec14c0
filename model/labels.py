"""What a label says beside the token that is to be predicted."""

IGNORED = -100  # nothing is trained here: the label that cross-entropy skips
