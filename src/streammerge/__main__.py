from streammerge.cli.main import run

run()
