"""The loop of PyTorch's DCGAN example, ported: two models, two optimizers, both stepped in one iteration."""

import torch
from strike import strike
from torch import nn

import orchestrator

run = orchestrator.init()
torch.manual_seed(run.seed)
nz, ngf = 8, 4
images = torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1

netG = run.prepare(
    nn.Sequential(
        nn.ConvTranspose2d(nz, 2 * ngf, 4, bias=False), nn.BatchNorm2d(2 * ngf), nn.ReLU(True),
        nn.ConvTranspose2d(2 * ngf, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )
)  # fmt: skip
netD = run.prepare(
    nn.Sequential(
        nn.Conv2d(1, 2 * ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * ngf), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * ngf, 1, 4, bias=False), nn.Sigmoid(), nn.Flatten(0),
    )
)  # fmt: skip
criterion = nn.BCELoss()
fixed_noise = torch.randn(4, nz, 1, 1, generator=torch.Generator().manual_seed(4))
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
run.track(netG=netG, netD=netD, optimizerD=optimizerD, optimizerG=optimizerG)

for real in run.batches(images, batch_size=16, epochs=4):
    netD.zero_grad()
    label = torch.full((len(real),), 1.0)
    errD_real = criterion(netD(real), label)
    errD_real.backward()
    noise = torch.randn(len(real), nz, 1, 1)
    fake = netG(noise)
    errD_fake = criterion(netD(fake.detach()), label.fill_(0.0))
    errD_fake.backward()
    strike("before D", run.rank, run.step)
    optimizerD.step()
    strike("between D and G", run.rank, run.step)
    netG.zero_grad()
    errG = criterion(netD(fake), label.fill_(1.0))
    errG.backward()
    optimizerG.step()
    run.log(loss_d=errD_real + errD_fake, loss_g=errG)
run.state["drawn"] = float(netG.eval()(fixed_noise).sum())
