"""`mixlora prepare`: what a training needs and cannot be downloaded ready to use."""
