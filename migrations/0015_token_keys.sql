-- Signing keys are announced before they sign and listed until the last token that they signed has ended.
ALTER TABLE token.signing_keys
    ADD COLUMN alg       text NOT NULL DEFAULT 'EdDSA',   -- RFC 7518 and 8037: EdDSA, ES256
    ADD COLUMN active_at timestamptz,                     -- it signs from then on, if none is newer
    ADD COLUMN ends_at   timestamptz;                     -- what it signed is refused from then on; NULL: it is not replaced yet
UPDATE token.signing_keys SET active_at = time;
ALTER TABLE token.signing_keys ALTER COLUMN active_at SET NOT NULL;
