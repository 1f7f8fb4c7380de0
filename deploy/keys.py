"""Creates an API key. Prints the key, for its owner, and its hash, for the endpoint's configuration.

meanflow keys alice
"""

import argparse
import secrets

from deploy.api.auth import hash_key


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog="meanflow keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="owner of the key; appears in the access log")
    name = parser.parse_args().name
    key = f"mf-{secrets.token_urlsafe(32)}"
    digest = hash_key(key)
    print(f"{name}'s key, for {name} only. It is not stored, and not shown again:\n  {key}")
    print(f"for the endpoint:\n  meanflow serve MODEL --api-keys {name} {digest}")
    print("or in a Serve config, in the user_config of Endpoint (topology one) or of Api (topology two):")
    print(f'  api_keys: {{{name}: "{digest}"}}')


if __name__ == "__main__":
    main()
