FROM python:3.13-slim AS build
COPY requirements.lock /src/
RUN python -m venv /opt/tombola && /opt/tombola/bin/pip install --no-cache-dir --no-deps --require-hashes -r /src/requirements.lock
COPY pyproject.toml README.md LICENSE /src/
COPY producers /src/producers
COPY worker /src/worker
COPY migrations /src/migrations
RUN /opt/tombola/bin/pip install --no-cache-dir --no-deps /src

FROM python:3.13-slim
RUN useradd --system --no-create-home tombola
COPY --from=build /opt/tombola /opt/tombola
ENV PATH=/opt/tombola/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER tombola
CMD ["celery", "-A", "tombola.worker", "worker", "--loglevel=INFO"]
