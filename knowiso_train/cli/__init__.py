"""Command line `knowiso`: measure, diagnose or compare networks, list the layers of a network, show a saved report.

knowiso layers resnet18
knowiso measure --source resnet18 --target resnet50 --layers layer3 layer4 --dataset hfds/cifar100 --directions both
--plot report.png
knowiso diagnose --weak resnet18 --strong resnet50 --layers layer3 layer4 --dataset FOLDER --html diagnosis.html
knowiso compare --model resnet18 --checkpoints output/run --layers "layer*" --dataset hfds/cifar100 --html compare.html
accelerate launch -m knowiso_train.cli measure ...
knowiso report report.json --html report.html --csv report.csv --plot report.png
"""

from knowiso_train.cli._main import main, parser

__all__ = ["main", "parser"]
