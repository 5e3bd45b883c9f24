"""Files -> volumes in canonical orientation, judged by what their headers say."""
