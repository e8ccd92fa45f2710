from streammerge.cli.main import main

main()
