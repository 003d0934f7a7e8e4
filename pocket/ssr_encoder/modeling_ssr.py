"""The class that `model_index.json` names for this folder: the one of the installed package.

diffusers imports the class of a component that is neither its own nor transformers' from a file in the component's folder.
"""

from diffusers_ssr import SSREncoder  # noqa: F401
