"""Do tasks pull an adapter's weights in opposite directions, and where (Eq. 2, 3)."""
