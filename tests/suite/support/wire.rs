//! As much of PostgreSQL's protocol as a proxy must read: where messages begin, which statement an Execute runs.

use std::collections::HashMap;

/// Asks for TLS, for GSS encryption; cancels a query.
pub const SSL: u32 = 80_877_103;
pub const GSS: u32 = 80_877_104;

/// Takes one whole message (kind, all bytes) from the front of `buffer`.
pub fn take(buffer: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let length = buffer.get(1..5).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize)?;
    if buffer.len() <= length {
        return None;
    }
    let rest = buffer.split_off(length + 1);
    let message = std::mem::replace(buffer, rest);
    Some((message[0], message))
}

/// The zero-ended string at the front, and what follows it.
pub fn text(bytes: &[u8]) -> (String, &[u8]) {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    (String::from_utf8_lossy(&bytes[..end]).into_owned(), bytes.get(end + 1..).unwrap_or_default())
}

/// A parameter of the startup message.
pub fn startup(message: &[u8], name: &str) -> Option<String> {
    let mut rest = message.get(8..)?;
    while !rest.is_empty() {
        let (key, after) = text(rest);
        let (value, after) = text(after);
        if key == name {
            return Some(value);
        }
        rest = after;
    }
    None
}

/// What the client of one connection said so far, as far as it bears on the next statement.
#[derive(Default)]
pub struct Session {
    statements: HashMap<String, String>,
    portals: HashMap<String, String>,
    /// Statements since the last `BEGIN`, that included; empty outside of a transaction block.
    block: Vec<String>,
}

/// A statement about to run.
#[derive(Clone, Debug)]
pub struct Statement {
    pub sql: String,
    /// It makes its transaction durable: a `COMMIT`, or a statement outside of a block.
    pub commits: bool,
    /// The SQL of the whole transaction up to here.
    pub transaction: String,
    /// It comes as Execute, so that a Sync follows.
    pub extended: bool,
}

impl Session {
    /// Reads one message of the client; says which statement it runs, if it runs one.
    pub fn read(&mut self, kind: u8, message: &[u8]) -> Option<Statement> {
        let body = &message[5..];
        match kind {
            b'Q' => Some(self.ran(text(body).0, false)),
            b'P' => {
                let (name, rest) = text(body);
                self.statements.insert(name, text(rest).0);
                None
            }
            b'B' => {
                let (portal, rest) = text(body);
                let sql = self.statements.get(&text(rest).0).cloned().unwrap_or_default();
                self.portals.insert(portal, sql);
                None
            }
            b'E' => {
                let sql = self.portals.get(&text(body).0).cloned().unwrap_or_default();
                Some(self.ran(sql, true))
            }
            _ => None,
        }
    }

    fn ran(&mut self, sql: String, extended: bool) -> Statement {
        let verb = sql.split([' ', ';', '\n']).find(|word| !word.is_empty()).unwrap_or_default().to_ascii_uppercase();
        let begins = matches!(verb.as_str(), "BEGIN" | "START");
        let ends = matches!(verb.as_str(), "COMMIT" | "END");
        let inside = !self.block.is_empty();
        if inside || begins {
            self.block.push(sql.clone());
        }
        let transaction = if inside { self.block.join("\n") } else { sql.clone() };
        if ends || verb == "ROLLBACK" {
            self.block.clear();
        }
        Statement { commits: ends || (!inside && !begins), transaction, sql, extended }
    }
}
