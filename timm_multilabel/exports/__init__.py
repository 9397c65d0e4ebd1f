"""A trained model in the forms that people deploy, each compared with the checkpoint before it is put in place."""
