"""`python -m chrysalis_ray` is `chrysalis`."""

from chrysalis_ray.cli.main import main

if __name__ == "__main__":
    main()
