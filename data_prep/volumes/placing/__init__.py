"""Where a head is: geometry, registration, and the cohort's own transforms."""
