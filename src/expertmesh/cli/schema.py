"""`expertmesh schema`: print the configuration's JSON Schema, for editors that complete and check YAML.

Save the output and begin a YAML file with `# yaml-language-server: $schema=expertmesh.schema.json`.
"""

import json

import typer


def schema() -> None:
    """Print the JSON Schema of the configuration: every key with its description, type and default."""
    from expertmesh.train.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))
