# The demo, and ckdiff itself: docker build -t ckdiff . && docker run --rm ckdiff
FROM python:3.12-slim
WORKDIR /ckdiff
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md ./
COPY package/metadata.py package/
COPY ckdiff ckdiff
RUN pip install --no-cache-dir -c constraints.txt '.[report]'
COPY examples/tiny_rl examples/tiny_rl
# kernels are kept in the home of whoever runs it: they are compiled now, for this processor
RUN useradd --create-home reader
USER reader
WORKDIR /home/reader
RUN python /ckdiff/examples/tiny_rl/demo.py > /dev/null && rm -r demo-out
CMD ["python", "/ckdiff/examples/tiny_rl/demo.py"]
