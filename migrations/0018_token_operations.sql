-- The tokens of a todo's steps end with it.
ALTER TABLE token.operations ADD COLUMN parent uuid;
CREATE INDEX operations_parent ON token.operations (parent) WHERE parent IS NOT NULL;
