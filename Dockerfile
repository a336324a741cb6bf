# docker build --tag megagpt .            Not built yet, for lack of Docker.
# The CUDA that PyTorch's wheel needs comes with it; gcc is for DeepSpeed's and PyTorch's compilers.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential git numactl openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /megagpt
COPY requirements.txt ./
RUN pip install --no-cache-dir "$(grep '^torch==' requirements.txt)" \
    && pip install --no-cache-dir --requirement requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
WORKDIR /work
ENTRYPOINT ["megagpt"]
