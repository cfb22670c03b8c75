-- State: whose a place in a queue is. Several requests may wait by one lease, on several daemons; those of one daemon share an
-- `asker`, and the last to ask has the place. Only they give it up, and what it became if they go before they hear of it.
ALTER TABLE state.queue ADD COLUMN asker uuid NOT NULL DEFAULT gen_random_uuid();
ALTER TABLE state.holds ADD COLUMN asker uuid;      -- null: it is nobody's to give back but its lease's
