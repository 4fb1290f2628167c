# docker build -t bcnn .                                             (PyTorch as published: CUDA and CPU)
# docker build -t bcnn --build-arg TORCH="torch torchvision --index-url URL" .   (URL: PyTorch's CPU wheels, 6 GB less)
# docker run --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/work" bcnn train data=folder data.root=images
FROM python:3.12-slim
ARG TORCH="torch torchvision"
COPY . /src
RUN pip install --no-cache-dir ${TORCH} && pip install --no-cache-dir "/src[demo,export,hub,timm]" && rm -r /src
# Workers hand batches over in /dev/shm, of which a container has 64 MB: hence --shm-size.
# The home is the folder that is mounted, so that downloaded weights and caches are kept beside the images.
RUN useradd --home-dir /work --create-home bcnn
USER bcnn
ENV HOME=/work
WORKDIR /work
ENTRYPOINT ["bcnn"]
CMD ["--help"]
