# The demo on a CPU, from the wheel:
#   pip wheel --no-deps -w dist . && docker build -t grasp-lora . && docker run -v "$PWD/runs:/work/runs" grasp-lora
# TORCH_INDEX=URL takes torch from that wheel index (for a build without CUDA, see the README).
FROM python:3.12-slim
ARG TORCH_INDEX=
COPY dist/grasp_lora-*-py3-none-any.whl /tmp/
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
 && pip install --no-cache-dir "$(ls /tmp/grasp_lora-*.whl)[demo]" \
 && rm /tmp/grasp_lora-*.whl \
 && useradd --create-home user && mkdir -p /work/runs && chown -R user /work
USER user
WORKDIR /work
ENTRYPOINT ["grasp-lora"]
CMD ["demo"]
