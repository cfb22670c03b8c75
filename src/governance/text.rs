//! Where each policy stands in a text: Cedar numbers policies in their order and keeps no place of them.

/// A policy as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Statement<'t> {
    /// Line of its first character, from 1.
    pub line: u32,
    /// Column in that line, from 1.
    pub column: u32,
    /// From its first annotation to its semicolon.
    pub text: &'t str,
}

/// Reads characters, and knows where it is.
struct Reader<'t> {
    text: &'t str,
    at: usize,
    line: u32,
    column: u32,
}

impl Reader<'_> {
    fn peek(&self) -> Option<char> {
        self.text.get(self.at..)?.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        (self.line, self.column) = if c == '\n' { (self.line + 1, 1) } else { (self.line, self.column + 1) };
        Some(c)
    }

    /// What follows a quotation mark, up to the next.
    fn string(&mut self) {
        while let Some(c) = self.next() {
            match c {
                '\\' => drop(self.next()),
                '"' => break,
                _ => {}
            }
        }
    }
}

/// The policies of a text, in order; none where it is Cedar's JSON.
pub(super) fn statements(text: &str) -> Vec<Statement<'_>> {
    if text.trim_start().starts_with('{') {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut began = None;
    let mut reader = Reader { text, at: 0, line: 1, column: 1 };
    loop {
        let here = (reader.at, reader.line, reader.column);
        let Some(c) = reader.next() else { return found };
        if c == '/' && reader.peek() == Some('/') {
            while reader.peek().is_some_and(|c| c != '\n') {
                reader.next();
            }
        } else if !c.is_whitespace() {
            let (start, line, column) = *began.get_or_insert(here);
            if c == '"' {
                reader.string();
            } else if c == ';' {
                found.push(Statement { line, column, text: text.get(start..reader.at).unwrap_or_default() });
                began = None;
            }
        }
    }
}

/// The bodies of a policy's `when` and `unless`, in order, as they are written.
pub(super) fn conditions(policy: &str) -> Vec<&str> {
    let (mut found, mut depth, mut began) = (Vec::new(), 0_usize, 0);
    walk(policy, |at, c| match c {
        '(' | '[' => depth += 1,
        '{' => {
            depth += 1;
            if depth == 1 {
                began = at + 1;
            }
        }
        ')' | ']' => depth = depth.saturating_sub(1),
        '}' => {
            depth = depth.saturating_sub(1);
            if depth == 0 {
                found.push(policy.get(began..at).unwrap_or_default().trim());
            }
        }
        _ => {}
    });
    found
}

/// What `&&` or `||` joins in an expression, as it is written.
pub(super) fn operands<'t>(expression: &'t str, operator: &str) -> Vec<&'t str> {
    let (mut found, mut depth, mut began) = (Vec::new(), 0_usize, 0);
    walk(expression, |at, c| match c {
        '(' | '[' | '{' => depth += 1,
        ')' | ']' | '}' => depth = depth.saturating_sub(1),
        _ if depth == 0 && at >= began && expression[at..].starts_with(operator) => {
            found.push(expression[began..at].trim());
            began = at + operator.len();
        }
        _ => {}
    });
    found.push(expression[began..].trim());
    found
}

/// Each character that is neither in a string nor in a comment, with its place.
fn walk(text: &str, mut each: impl FnMut(usize, char)) {
    let mut reader = Reader { text, at: 0, line: 1, column: 1 };
    loop {
        let at = reader.at;
        let Some(c) = reader.next() else { return };
        if c == '/' && reader.peek() == Some('/') {
            while reader.peek().is_some_and(|c| c != '\n') {
                reader.next();
            }
        } else if c == '"' {
            reader.string();
        } else {
            each(at, c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_and_their_operands_are_found_as_they_are_written() {
        let policy = r#"@id("a{b}") permit (principal, action in [A::"x"], resource)
            when { resource.a > 4 && (x || {"&&": 1} == y) } // { no }
            unless { principal["}"] == "a && b" };"#;
        let found = conditions(policy);
        assert_eq!(found, [r#"resource.a > 4 && (x || {"&&": 1} == y)"#, r#"principal["}"] == "a && b""#]);
        assert_eq!(operands(found[0], "&&"), ["resource.a > 4", r#"(x || {"&&": 1} == y)"#]);
        assert_eq!(operands(found[1], "&&"), [found[1]]);
        assert_eq!(operands("a||b || c", "||"), ["a", "b", "c"]);
    }

    #[test]
    fn a_policy_begins_at_its_first_annotation_and_ends_at_its_semicolon() {
        let text = "// a; \"comment\"\n\n@id(\"a;\\\"b\")\npermit (principal, action, resource); // x\n  forbid (principal, action, resource)\nwhen { \"ä//;\" == \";\" };permit(principal,action,resource);\n// end\n";
        let found: Vec<_> = statements(text).into_iter().map(|s| (s.line, s.column, s.text)).collect();
        assert_eq!(
            found,
            [
                (3, 1, "@id(\"a;\\\"b\")\npermit (principal, action, resource);"),
                (5, 3, "forbid (principal, action, resource)\nwhen { \"ä//;\" == \";\" };"),
                (6, 24, "permit(principal,action,resource);"),
            ]
        );
        assert!(statements("  {\"staticPolicies\": \";\"}").is_empty() && statements("").is_empty());
        assert!(statements("permit (\"open;").is_empty(), "what does not end is no policy");
    }
}
