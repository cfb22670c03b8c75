-- Entries are in the order of their times: a time is found among the indexes by halving, and needs no index of its own that
-- every entry pays for.
DROP INDEX audit.search_time;
