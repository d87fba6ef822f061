"""Groups of options, each option written once as a field; ``args.py`` composes the commands of them."""
