-- What each policy wants of those who approve a change: several policies may each name a role of their own.
ALTER TABLE governance.proposals ADD COLUMN needs bytea;    -- JSON: [{required, role, outside}]
UPDATE governance.proposals SET needs = convert_to(
    json_build_array(json_build_object('required', required, 'role', role, 'outside', outside))::text, 'UTF8');
ALTER TABLE governance.proposals ALTER COLUMN needs SET NOT NULL;
CREATE INDEX proposals_author ON governance.proposals (author) WHERE status = 'pending';

ALTER TABLE governance.approvals ADD COLUMN roles text[] NOT NULL DEFAULT '{}';    -- those of the roles that were wanted which the approver was in
UPDATE governance.approvals AS a SET roles = ARRAY[p.role] FROM governance.proposals AS p
WHERE p.id = a.proposal AND p.role IS NOT NULL;
