"""An OpenAI-compatible server around an Engine; needs ``pip install 'transmla_ext[serve]'``."""

from .app import create_app
from .server import Server, serve

__all__ = ["Server", "create_app", "serve"]
