from .assignment import main

main()
