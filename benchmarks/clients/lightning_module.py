"""Image classification as a module of Lightning: data module, CSV logger, checkpoints."""

import argparse

import lightning as L
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, ToTensor

import knowiso_train as ki  # + knowiso
from knowiso_train.integrations.lightning import IsomorphismLightningCallback  # + knowiso

NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageFolders(L.LightningDataModule):
    """Folders of training and validation images."""

    def __init__(self, folder, batch_size):
        super().__init__()
        augment = Compose([RandomHorizontalFlip(), ToTensor(), NORMALIZE])
        self.train = ImageFolder(f"{folder}/train", augment)
        self.validation = ImageFolder(f"{folder}/validation", Compose([ToTensor(), NORMALIZE]))
        self.batch_size = batch_size

    def train_dataloader(self):
        """Return the loader of the training images."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        """Return the loader of the validation images."""
        return DataLoader(self.validation, self.batch_size)


class Classifier(L.LightningModule):
    """Network of timm with SGD and a cosine schedule."""

    def __init__(self, model, num_classes, lr):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(model, num_classes=num_classes)
        teacher = timm.create_model("resnet10t", num_classes=num_classes, checkpoint_path="teacher.pth")  # + knowiso
        self.iso = ki.IsomorphismLoss(self.model, teacher, ["layer2", "layer3"])  # + knowiso

    def training_step(self, batch, index):
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        loss = loss + self.iso()  # + knowiso
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        """Log the accuracy on a batch."""
        images, labels = batch
        accuracy = (self.model(images).argmax(dim=1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self):
        """Return optimizer and schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main():
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--resume")
    args = parser.parse_args()
    L.seed_everything(42)
    data = ImageFolders(args.data, args.batch_size)
    classifier = Classifier(args.model, len(data.train.classes), args.lr)
    checkpoints = ModelCheckpoint(args.output, filename="{epoch}", save_top_k=-1)
    callbacks = [checkpoints]
    callbacks.append(IsomorphismLightningCallback(classifier.iso))  # + knowiso
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=CSVLogger(args.output, name="", version="logs"),
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(classifier, data, ckpt_path=args.resume)
    torch.save(classifier.model.state_dict(), f"{args.output}/model.pth")


if __name__ == "__main__":
    main()
