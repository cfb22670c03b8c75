-- Who registered an instance: that client is the service, where something is meant for it.
ALTER TABLE nexus.instances ADD COLUMN owner text COLLATE "C" NOT NULL DEFAULT '';
