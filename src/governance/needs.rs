//! What a change waits for: how many, of which role, of another team, within what time. Each policy that forbids it says so for
//! itself, and all of them have to be content.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::compiled::span;

/// How long a proposal stands where no policy says.
const WITHIN: Duration = Duration::from_secs(7 * 86_400);

/// What one policy wants of those who approve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = ApprovalNeed)]
pub struct Need {
    /// How many approve
    pub required: i32,
    /// The role whose approvals count; of anybody without it
    pub role: Option<String>,
    /// How many of them are of another team than the author's
    pub outside: i32,
}

impl Need {
    /// Whether whoever meets this meets the other.
    fn covers(&self, other: &Self) -> bool {
        (other.role.is_none() || self.role == other.role)
            && self.required >= other.required
            && self.outside >= other.outside
    }

    /// Whether somebody in these roles counts.
    pub fn counts(&self, roles: &[String]) -> bool {
        self.role.as_ref().is_none_or(|role| roles.contains(role))
    }

    fn said(&self) -> String {
        let mut text = format!("{} other{}", self.required, if self.required == 1 { "" } else { "s" });
        if let Some(role) = &self.role {
            text.push_str(&format!(" in the role {role}"));
        }
        if self.outside > 0 {
            text.push_str(&format!(", {} of them of another team", self.outside));
        }
        text
    }
}

/// What a change waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Requirement {
    /// At least one, of none of which another takes care.
    pub needs: Vec<Need>,
    pub within: Duration,
}

impl Default for Requirement {
    fn default() -> Self {
        Self { needs: vec![Need { required: 1, role: None, outside: 0 }], within: WITHIN }
    }
}

impl Requirement {
    /// Whether a proposal asked for at least this: policy may have become stricter, and another may have proposed it.
    pub fn met_by(&self, needs: &[Need]) -> bool {
        self.needs.iter().all(|wanted| needs.iter().any(|need| need.covers(wanted)))
    }

    /// What both want, together.
    pub fn and(mut self, other: Self) -> Self {
        other.needs.into_iter().for_each(|need| self.add(need));
        self.within = self.within.min(other.within);
        self
    }

    fn add(&mut self, mut new: Need) {
        if let Some(same) = self.needs.iter().find(|need| need.role == new.role) {
            (new.required, new.outside) = (new.required.max(same.required), new.outside.max(same.outside));
        }
        if !self.needs.iter().any(|need| need.covers(&new)) {
            self.needs.retain(|need| !new.covers(need));
            self.needs.push(new);
        }
    }

    /// Takes over what the annotations of a policy say.
    pub fn tighten<'a>(&mut self, annotation: impl Fn(&str) -> Option<&'a str>) {
        let number = |name: &str, least: i32| annotation(name).and_then(|n| n.parse::<i32>().ok()).unwrap_or(least);
        let role = annotation("approvers").map(str::to_owned);
        self.add(Need { required: number("approvals", 1).max(1), role, outside: number("outside", 0).max(0) });
        if let Some(within) = annotation("within").and_then(span) {
            self.within = self.within.min(within);
        }
    }

    /// In words.
    pub fn said(&self) -> String {
        self.needs.iter().map(Need::said).collect::<Vec<_>>().join(", and ")
    }
}

/// How many approve at least.
pub(super) fn required(needs: &[Need]) -> i32 {
    needs.iter().map(|need| need.required).max().unwrap_or(1)
}

/// How many of them are of another team at least.
pub(super) fn outside(needs: &[Need]) -> i32 {
    needs.iter().map(|need| need.outside).max().unwrap_or(0)
}

/// The role whose approvals count, where it is the only one.
pub(super) fn role(needs: &[Need]) -> Option<&String> {
    if let [one] = needs { one.role.as_ref() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(policies: &[&[(&'static str, &'static str)]]) -> Requirement {
        let mut all = Requirement::default();
        for policy in policies {
            all.tighten(|name| policy.iter().find(|(n, _)| *n == name).map(|(_, value)| *value));
        }
        all
    }

    #[test]
    fn every_policy_is_content_or_none_is() {
        let security: &[(&str, &str)] = &[("approvals", "2"), ("approvers", "security")];
        let finance: &[(&str, &str)] = &[("approvals", "1"), ("approvers", "finance"), ("outside", "1")];
        let anybody: &[(&str, &str)] = &[("approvals", "3")];
        let both = of(&[security, finance]);
        assert_eq!(both.needs.len(), 2, "what anybody could do, two of security do: {both:?}");
        assert_eq!(both, of(&[security]).and(of(&[finance])));
        assert!(!both.met_by(&of(&[security]).needs) && !both.met_by(&of(&[finance]).needs));
        assert!(of(&[finance]).met_by(&both.needs) && of(&[]).met_by(&both.needs));
        assert_eq!(of(&[security, anybody]).needs.len(), 2, "three of anybody, two of them of security");
        let stricter: &[(&str, &str)] = &[("approvals", "1"), ("approvers", "security"), ("outside", "1")];
        let one = of(&[security, stricter]);
        assert_eq!(one.needs, [Need { required: 2, role: Some("security".into()), outside: 1 }]);
        assert_eq!((required(&one.needs), outside(&one.needs)), (2, 1));
        assert_eq!(one.said(), "2 others in the role security, 1 of them of another team");
        assert_eq!(of(&[&[("approvals", "none")]]), Requirement::default(), "what cannot be read asks for one");
    }
}
