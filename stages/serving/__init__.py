"""What runs beside a model while it is served: the standard library alone. Stage package puts these modules
into its artifact, and stage evaluate asks every model through the same front.
"""
