"""The tables of the page's file, as steps from one version to the next; a step that was released is never changed."""

__all__ = ["MIGRATIONS"]

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE papers (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        slug TEXT UNIQUE,
        title TEXT NOT NULL,
        abstract TEXT NOT NULL,
        entry TEXT NOT NULL,
        published TEXT,
        day TEXT NOT NULL,
        changed TEXT NOT NULL,
        merged_into INTEGER REFERENCES papers (id)
    );
    CREATE INDEX papers_day ON papers (day DESC, id DESC) WHERE merged_into IS NULL;
    CREATE INDEX papers_merged ON papers (merged_into) WHERE merged_into IS NOT NULL;
    CREATE TABLE aliases (
        alias TEXT PRIMARY KEY,
        paper INTEGER NOT NULL REFERENCES papers (id)
    ) WITHOUT ROWID;
    CREATE INDEX aliases_paper ON aliases (paper);
    CREATE TABLE records (
        id INTEGER PRIMARY KEY,
        paper INTEGER NOT NULL REFERENCES papers (id),
        source TEXT NOT NULL,
        form TEXT NOT NULL,
        digest BLOB NOT NULL UNIQUE,
        fetched TEXT NOT NULL,
        day TEXT,
        entry TEXT NOT NULL,
        raw BLOB
    );
    CREATE INDEX records_paper ON records (paper);
    CREATE TABLE appearances (
        day TEXT NOT NULL,
        paper INTEGER NOT NULL REFERENCES papers (id),
        source TEXT NOT NULL,
        PRIMARY KEY (day, paper, source)
    ) WITHOUT ROWID;
    CREATE INDEX appearances_paper ON appearances (paper);
    CREATE TABLE votes (
        id INTEGER PRIMARY KEY,
        paper INTEGER NOT NULL REFERENCES papers (id),
        voter TEXT NOT NULL,
        value INTEGER NOT NULL,
        at TEXT NOT NULL
    );
    CREATE INDEX votes_paper ON votes (paper, voter, id);
    CREATE INDEX votes_at ON votes (at);
    CREATE TABLE signals (
        id INTEGER PRIMARY KEY,
        paper INTEGER NOT NULL REFERENCES papers (id),
        name TEXT NOT NULL,
        value REAL NOT NULL,
        at TEXT NOT NULL
    );
    CREATE INDEX signals_paper ON signals (paper, name, id);
    CREATE INDEX signals_at ON signals (at);
    CREATE TABLE merges (
        id INTEGER PRIMARY KEY,
        kept INTEGER NOT NULL REFERENCES papers (id),
        merged INTEGER NOT NULL REFERENCES papers (id),
        aliases TEXT NOT NULL,
        records TEXT NOT NULL,
        why TEXT NOT NULL,
        at TEXT NOT NULL,
        undone TEXT
    );
    CREATE TABLE sources (
        name TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        url TEXT NOT NULL,
        options TEXT NOT NULL,
        added TEXT NOT NULL,
        state TEXT NOT NULL
    );
    CREATE TABLE pulls (
        id INTEGER PRIMARY KEY,
        source TEXT NOT NULL,
        started TEXT NOT NULL,
        finished TEXT,
        outcome TEXT NOT NULL,
        new INTEGER NOT NULL, changed INTEGER NOT NULL, same INTEGER NOT NULL,
        skipped TEXT NOT NULL
    );
    CREATE TABLE embeddings (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        paper INTEGER NOT NULL REFERENCES papers (id),
        model TEXT NOT NULL,
        length INTEGER NOT NULL,
        dimension INTEGER NOT NULL,
        content BLOB NOT NULL,
        vector BLOB NOT NULL,
        UNIQUE (model, length, dimension, paper)
    );
    CREATE TABLE saved_views (
        name TEXT PRIMARY KEY,
        query TEXT NOT NULL,
        made TEXT NOT NULL
    );
    CREATE TABLE subscribers (
        id INTEGER PRIMARY KEY,
        email TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL CHECK (state IN ('pending', 'active', 'unsubscribed', 'suspended')),
        rhythm TEXT NOT NULL CHECK (rhythm IN ('daily', 'weekly')),
        topics TEXT NOT NULL,
        views TEXT NOT NULL,
        handle BLOB NOT NULL UNIQUE,
        secret BLOB NOT NULL,
        asked TEXT NOT NULL,
        confirmed TEXT,
        ended TEXT,
        bounces INTEGER NOT NULL DEFAULT 0,
        bounced TEXT
    );
    CREATE TABLE asks (
        id INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        email TEXT NOT NULL,
        caller TEXT
    );
    CREATE INDEX asks_at ON asks (at);
    CREATE TABLE tokens (
        digest BLOB PRIMARY KEY,
        subscriber INTEGER NOT NULL REFERENCES subscribers (id),
        wishes TEXT NOT NULL,
        expires TEXT NOT NULL,
        used TEXT
    ) WITHOUT ROWID;
    CREATE INDEX tokens_subscriber ON tokens (subscriber);
    CREATE TABLE outbox (
        id INTEGER PRIMARY KEY,
        issue TEXT NOT NULL,
        subscriber INTEGER NOT NULL REFERENCES subscribers (id),
        message_id TEXT NOT NULL UNIQUE,
        message BLOB NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('queued', 'sending', 'sent', 'failed', 'unsure')),
        attempts INTEGER NOT NULL DEFAULT 0,
        next_try TEXT,
        problem TEXT,
        changed TEXT NOT NULL,
        UNIQUE (issue, subscriber)
    );
    CREATE INDEX outbox_subscriber ON outbox (subscriber, id);
    CREATE INDEX outbox_waiting ON outbox (state, id) WHERE state IN ('queued', 'sending', 'unsure');
    CREATE TABLE delivered (
        subscriber INTEGER NOT NULL REFERENCES subscribers (id),
        paper INTEGER NOT NULL REFERENCES papers (id),
        issue TEXT NOT NULL,
        PRIMARY KEY (subscriber, paper)
    ) WITHOUT ROWID;
    CREATE VIRTUAL TABLE words USING fts5 (
        title, abstract, content = 'papers', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2'
    );
    INSERT INTO words (words, rank) VALUES ('hashsize', 33554432);
    """,
)
