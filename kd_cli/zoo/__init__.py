"""The former home of models and data sets: what users' own code imports from here is found where it is now."""
